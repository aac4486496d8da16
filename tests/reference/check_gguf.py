#!/usr/bin/env python3
"""Checks files of `titanbit export --format gguf` with the programs that read them.

    python3 -m venv venv && venv/bin/pip install gguf tokenizers llama-cpp-python
    TITANBIT_PYTHON=venv/bin/python cargo test --test gguf -- --nocapture

The tests call it:

    check_gguf.py tensors DIR TQ2_0|TQ1_0     gguf reads from DIR/model.gguf the codes and scales of
                                              DIR/masters.safetensors, a model of DIR/config.json
    check_gguf.py tokens [all|no-leading-blank TOKENIZER.json FILE.gguf] ...
                                              llama.cpp makes the same tokens of text as `tokenizers`
    check_gguf.py model DIR                   llama.cpp with DIR/model.gguf gives the logits, within a
                                              tolerance, and the greedy tokens of DIR/expected.json
"""

import json
import random
import sys
from pathlib import Path


def read_safetensors(path):
    """Name -> f32 array, after the format's description."""
    import numpy as np

    data = path.read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        assert info["dtype"] == "F32", info
        start, end = (8 + header_bytes + offset for offset in info["data_offsets"])
        tensors[name] = np.frombuffer(data[start:end], dtype="<f4").reshape(info["shape"])
    return tensors


def check_tensors(directory, ternary):
    import gguf
    import numpy as np
    from gguf import GGMLQuantizationType as Type
    from gguf import GGUFValueType as Kind

    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text())
    masters = read_safetensors(directory / "masters.safetensors")
    reader = gguf.GGUFReader(directory / "model.gguf")

    f32 = lambda x: float(np.float32(x))
    head_dim = config["hidden_size"] // config["heads"]
    for key, kind, value in [
        ("general.architecture", Kind.STRING, "bitnet"),
        ("general.type", Kind.STRING, "model"),
        ("general.name", Kind.STRING, "a model"),
        ("general.file_type", Kind.UINT32, int(gguf.LlamaFileType[f"MOSTLY_{ternary}"])),
        ("general.quantization_version", Kind.UINT32, gguf.GGML_QUANT_VERSION),
        (gguf.Keys.LLM.VOCAB_SIZE, Kind.UINT32, config["vocab_size"]),
        (gguf.Keys.LLM.CONTEXT_LENGTH, Kind.UINT32, config["max_seq_len"]),
        (gguf.Keys.LLM.EMBEDDING_LENGTH, Kind.UINT32, config["hidden_size"]),
        (gguf.Keys.LLM.BLOCK_COUNT, Kind.UINT32, config["layers"]),
        (gguf.Keys.LLM.FEED_FORWARD_LENGTH, Kind.UINT32, config["intermediate_size"]),
        (gguf.Keys.Attention.HEAD_COUNT, Kind.UINT32, config["heads"]),
        (gguf.Keys.Attention.HEAD_COUNT_KV, Kind.UINT32, config["kv_heads"]),
        (gguf.Keys.Attention.LAYERNORM_RMS_EPS, Kind.FLOAT32, f32(config["rms_norm_eps"])),
        (gguf.Keys.Rope.FREQ_BASE, Kind.FLOAT32, f32(config["rope_theta"])),
        (gguf.Keys.Rope.DIMENSION_COUNT, Kind.UINT32, head_dim),
        (gguf.Keys.Tokenizer.MODEL, Kind.STRING, "gpt2"),
        (gguf.Keys.Tokenizer.PRE, Kind.STRING, "gpt-2"),
        (gguf.Keys.Tokenizer.EOS_ID, Kind.UINT32, 0),
        (gguf.Keys.Tokenizer.BOS_ID, Kind.UINT32, 0),
        (gguf.Keys.Tokenizer.ADD_BOS, Kind.BOOL, False),
        (gguf.Keys.Tokenizer.ADD_EOS, Kind.BOOL, False),
    ]:
        field = reader.fields[key.format(arch="bitnet")]
        assert (field.types, field.contents()) == ([kind], value), (key, field.types, field.contents())
    tokens = reader.fields[gguf.Keys.Tokenizer.LIST]
    types = reader.fields[gguf.Keys.Tokenizer.TOKEN_TYPE]
    assert tokens.types == [Kind.ARRAY, Kind.STRING] and types.types == [Kind.ARRAY, Kind.INT32]
    assert len(tokens.contents()) == len(types.contents()) == config["vocab_size"]
    last = config["vocab_size"] - 1
    assert tokens.contents()[last] == f"[PAD{last}]" and types.contents()[last] == gguf.TokenType.UNUSED
    assert tokens.contents()[0] == "<|endoftext|>" and types.contents()[0] == gguf.TokenType.CONTROL

    # What gguf's own table calls weights; it knows the norms inside a block by older names.
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BITNET, config["layers"])
    older = {"self_attn.attn_sub_norm": "self_attn.inner_attn_ln", "mlp.ffn_sub_norm": "mlp.ffn_layernorm"}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    seen = set()
    for name, master in masters.items():
        stem = name.removesuffix(".weight")
        for new, old in older.items():
            stem = stem.replace(new, old)
        stem = table.get_name(stem)
        tensor = tensors[f"{stem}.weight"]
        seen.add(f"{stem}.weight")
        assert list(tensor.shape) == list(master.shape)[::-1], (name, tensor.shape)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(master.shape)
        if not name.endswith("_proj.weight"):
            is_table = master.ndim == 2
            assert tensor.tensor_type == (Type.F16 if is_table else Type.F32)
            expected = master.astype(np.float16).astype(np.float32) if is_table else master
            np.testing.assert_array_equal(values, expected)
            continue
        fits = master.shape[1] % 256 == 0
        assert tensor.tensor_type == (Type[ternary] if fits else Type.Q4_0), (name, tensor.tensor_type)
        scale = tensors[f"{stem}.scale"]
        seen.add(f"{stem}.scale")
        assert scale.tensor_type == Type.F32 and list(scale.shape) == [1]
        b = np.float32(max(np.abs(master).mean(dtype=np.float64), 1e-5))
        assert scale.data[0] == b, (name, scale.data[0], b)
        np.testing.assert_array_equal(values, np.clip(np.rint(master / b), -1, 1))
    assert seen == set(tensors), seen ^ set(tensors)
    print(f"gguf reads {len(tensors)} tensors, {ternary}: codes and scales of the masters")


TEXTS = [
    "",
    "Hello, world!",
    "it's I'VE don't we'll THEY'RE 'tis",
    "tabs\tand\n\nnewlines\r\n  and trailing blanks   ",
    "3 33 333 3333 33333 1234567890 3.14 1,000,000 ½ Ⅷ ٣٤ ９９",
    "Zwölf Boxkämpfer jagen Viktor über den großen Sylter Deich",
    "Съешь ещё этих мягких французских булок",
    "吾輩は猫である。名前はまだ無い。",
    "ខ្ញុំ हिन्दी עברית العربية ไทย",
    "🚀 🙂👍🏽 🧑‍🚀 😶‍🌫️ 🇩🇪",
    "non\u00a0breaking\u2003em\u200bzero\ufeffbom\u2028line",
    "for (i = 0; i < 10; ++i) {\n        x[i] += y->z; // ok\n}",
    "https://example.org/a_b?c=d&e=%20#f <|endoftext|",
    "\x00\x01\x7f\u0085",
]


def difficult_texts(seed=1):
    """Texts of many kinds, runs of blanks and newlines, and 1500 random mixtures of them."""
    texts = list(TEXTS)
    texts += ["a" + " " * n + "b" for n in range(2, 40)] + [" " * n for n in range(1, 40)]
    texts += ["x" + "\n" * n + "y" for n in range(2, 6)]
    characters = " \t\n\r  aAbZé漢字あ한🙂🧑‍🚀'’.,;0123９Ⅷ½_-<>\u00a0\u2028\u200bİßЖж"
    rng = random.Random(seed)
    for _ in range(1500):
        texts.append("".join(rng.choice(characters) for _ in range(rng.randint(1, 40))))
    return texts


def check_tokens(kind, tokenizer_path, gguf_path):
    from llama_cpp import Llama
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_path)
    llama = Llama(gguf_path, vocab_only=True, verbose=False)
    texts = difficult_texts()
    plain = len(texts)
    if kind == "all":
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        texts += [f"a{token} b {token}{token}c\n{token}" for token in added]
    else:
        texts = [text for text in texts if not text.startswith(" ")]
    for add_special in (False, True):
        for text in texts:
            found = llama.tokenize(text.encode(), add_bos=add_special, special=True)
            expected = tokenizer.encode(text, add_special_tokens=add_special).ids
            assert found == expected, (tokenizer_path, add_special, text, found, expected)
    for text in texts[:plain]:
        ids = llama.tokenize(text.encode(), add_bos=False, special=True)
        # llama.cpp's pieces are bytes; the blank in front of a text is SentencePiece's.
        found = b"".join(llama.detokenize([id], special=True) for id in ids).decode()
        assert found in (text, " " + text), (tokenizer_path, text, found)
    name = Path(tokenizer_path).stem
    print(f"llama.cpp makes the tokens of `tokenizers` of {2 * len(texts)} texts: {name}")


def check_model(directory):
    import numpy as np
    from llama_cpp import Llama

    directory = Path(directory)
    expected = json.loads((directory / "expected.json").read_text())
    open_file = lambda **options: Llama(
        str(directory / "model.gguf"), n_ctx=128, logits_all=True, verbose=False, **options
    )
    f32 = 0  # GGML_TYPE_F32: by default keys and values are kept in 16 bits
    llama = open_file(type_k=f32, type_v=f32)
    llama.eval(expected["ids"])
    logits = np.array(expected["logits"])
    found = llama.scores[: len(logits)]
    error = np.linalg.norm(found - logits) / np.linalg.norm(logits)
    best = (found.argmax(-1) == logits.argmax(-1)).mean()
    print(f"llama.cpp's logits differ by {error:.1e} of their norm; {best:.0%} of the best tokens are the same")
    assert error < expected["tolerance"], error
    llama = open_file()
    for prompt, continuation in zip(expected["prompts"], expected["continuations"]):
        llama.reset()
        llama.eval(prompt)
        tokens = []
        for _ in continuation:
            tokens.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
            llama.eval(tokens[-1:])
        assert tokens == continuation, (prompt, tokens, continuation)
    count = sum(map(len, expected["continuations"]))
    print(f"llama.cpp continues {len(expected['prompts'])} prompts by the same {count} tokens")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "tensors":
        check_tensors(*arguments)
    elif command == "tokens":
        for at in range(0, len(arguments), 3):
            check_tokens(*arguments[at : at + 3])
    elif command == "model":
        check_model(*arguments)
    else:
        sys.exit(__doc__)
