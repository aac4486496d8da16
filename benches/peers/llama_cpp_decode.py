#!/usr/bin/env python3
"""Measures how fast llama.cpp runs a GGUF file on the CPU.

    pip install llama-cpp-python       # from its source package: built for this machine
    python3 benches/peers/llama_cpp_decode.py MODEL.gguf --threads 2 --prompt 128 --tokens 128

Random ids, through the calls of llama.h: the prompt is one llama_decode, every further token one of its own, whose
logits are computed and not looked at. A round before the first that counts warms up. Prints a JSON object with the
tokens per second of every round and their median.

A file with random weights, as the quantised products do not care:

    TITANBIT_GGUF=125m.gguf TITANBIT_PRESET=125M cargo test --release --test gguf -- --ignored random_weights
"""

import argparse
import ctypes
import json
import os
import random
import statistics
import time

import llama_cpp


def main():
    arguments = argparse.ArgumentParser(description="Measures llama.cpp on the CPU.")
    arguments.add_argument("model", help="a GGUF file")
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments.add_argument("--prompt", type=int, default=128, help="tokens before the first that is decoded")
    arguments.add_argument("--tokens", type=int, default=128, help="tokens decoded one by one")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments = arguments.parse_args()

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(arguments.model.encode(), parameters)
    if not model:
        raise SystemExit(f"error: llama.cpp cannot load {arguments.model}")
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = arguments.prompt + arguments.tokens
    parameters.n_batch = max(arguments.prompt, parameters.n_batch)
    parameters.n_threads = parameters.n_threads_batch = arguments.threads
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise SystemExit("error: llama.cpp cannot make a context")

    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rng = random.Random(1)

    def decode(ids):
        array = (llama_cpp.llama_token * len(ids))(*ids)
        status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(ids)))
        llama_cpp.llama_synchronize(context)
        if status:
            raise SystemExit(f"error: llama_decode gives {status}")

    ids = lambda count: [rng.randrange(vocab_size) for _ in range(count)]
    prefill, decoding = [], []
    for _ in range(1 + arguments.rounds):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        start = time.perf_counter()
        decode(ids(arguments.prompt))
        middle = time.perf_counter()
        for token in ids(arguments.tokens):
            decode([token])
        end = time.perf_counter()
        prefill.append(arguments.prompt / (middle - start))
        decoding.append(arguments.tokens / (end - middle))

    description = ctypes.create_string_buffer(256)
    llama_cpp.llama_model_desc(model, description, len(description))
    result = {
        "model": description.value.decode(),
        "model_bytes": llama_cpp.llama_model_size(model),
        "llama_cpp_python": llama_cpp.__version__,
        "system": llama_cpp.llama_print_system_info().decode(),
        "threads": arguments.threads,
        "prompt": arguments.prompt,
        "tokens": arguments.tokens,
        "prefill_tokens_per_s": round(statistics.median(prefill[1:]), 1),
        "decode_tokens_per_s": round(statistics.median(decoding[1:]), 2),
        "prefill_rounds": [round(rate, 1) for rate in prefill[1:]],
        "decode_rounds": [round(rate, 2) for rate in decoding[1:]],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
