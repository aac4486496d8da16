#!/usr/bin/env python3
"""What EleutherAI's lm-evaluation-harness makes of the questions in `tasks/`: prompts, tokens, log-likelihoods, scores.

The questions are made up, in the form in which the authors of HellaSwag, ARC and PIQA publish theirs. Here they get
the columns that the harness's data sets have and go through its own tasks and its own `hf` model class; the network
behind that is the plain PyTorch decoder of `bitnet_reference.py` with random weights.

    python3 -m venv venv && venv/bin/pip install torch transformers safetensors lm-eval
    venv/bin/python tests/reference/lm_eval_reference.py    # writes three files beside itself

`lm_eval_reference.jsonl` has for each file of questions the harness's scores, and for each question its prompt in text
and in tokens and the log-likelihood of each choice; `lm_eval_reference.safetensors` has the weights, its metadata the
shape; `lm_eval_tokenizer.json` is a byte-level BPE vocabulary. The stored files are of lm_eval 0.4.13, transformers
5.23.0 and torch 2.15.0.
"""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import lm_eval
import torch
from bitnet_reference import NORM_EPS, ROPE_THETA, Config, decoder, make_inputs
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

HERE = Path(__file__).parent
TASKS = f"{Path(lm_eval.__file__).parent}/tasks/"
SEQ = 96
SEED = 7
END_OF_TEXT = "<|endoftext|>"
QUERY = {
    "task": "questions",
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "test_split": "test",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


def read(name):
    return [json.loads(line) for line in (HERE / "tasks" / name).read_text().split("\n") if line]


def hellaswag(rows):
    return [row | {"label": str(row["label"])} for row in rows]


def arc(rows):
    def choices(row):
        return {key: [choice[key] for choice in row["question"]["choices"]] for key in ("text", "label")}

    return [
        {"question": row["question"]["stem"], "choices": choices(row), "answerKey": row["answerKey"]} for row in rows
    ]


def piqa(rows):
    labels = (HERE / "tasks" / "valid-labels.lst").read_text().split()
    return [row | {"label": int(label)} for row, label in zip(rows, labels, strict=True)]


# File, what its data set's columns are made by, and the harness's task.
FILES = [
    ("questions.jsonl", list, QUERY),
    ("hellaswag_val.jsonl", hellaswag, {"include": TASKS + "hellaswag/hellaswag.yaml"}),
    ("ARC-Challenge-Test.jsonl", arc, {"include": TASKS + "arc/arc_challenge.yaml"}),
    ("valid.jsonl", piqa, {"include": TASKS + "piqa/piqa.yaml"}),
]


def train_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted((HERE / "tasks").glob("*.jsonl"))], trainer)
    return tokenizer


class Reference(PreTrainedModel):
    """The plain decoder, as the harness wants a model to be."""

    config_class = PreTrainedConfig

    def __init__(self, params, config):
        super().__init__(PreTrainedConfig(max_position_embeddings=config.seq, vocab_size=config.vocab_size))
        self.shape, self.params = config, params
        self.weight = torch.nn.Parameter(torch.zeros(1))  # tells the harness where the model is

    def tie_weights(self, *args, **kwargs):
        pass

    def forward(self, input_ids, **kwargs):
        return CausalLMOutput(logits=decoder(self.params, input_ids, self.shape))


def load_task(manager, task, rows, directory):
    """The task over `rows` in place of the data set that the harness would download."""
    data = Path(directory) / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = {split: str(data) for split in ("train", "validation", "test")}
    task = task | {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": splits}}
    config = Path(directory) / "task.yaml"
    config.write_text(json.dumps(task))  # JSON is YAML
    return manager.load([str(config)])


def question(lm, sample):
    (query,) = {arguments[0] for arguments in sample["arguments"]}
    encoded = []
    for context, choice in sample["arguments"]:
        if context:
            encoded.append(lm._encode_pair(context, choice))
        else:
            encoded.append(([lm.prefix_token_id], lm.tok_encode(choice, add_special_tokens=False)))
    return {
        "query": query,
        "choices": [choice.removeprefix(" ") for _, choice in sample["arguments"]],
        "gold": sample["target"],
        "context": encoded[0][0],
        "continuations": [continuation for _, continuation in encoded],
        "log_likelihoods": [float(response[0]) for response in sample["filtered_resps"]],
        "acc": sample["acc"],
        "acc_norm": sample["acc_norm"],
    }


def main():
    torch.set_num_threads(1)  # small matrices, and one order of summation
    tokenizer = train_tokenizer()
    tokenizer.save(str(HERE / "lm_eval_tokenizer.json"))
    config = Config(tokenizer.get_vocab_size(), 32, 2, 4, 2, 48, "silu", True, batch=1, seq=SEQ)
    params, _, _ = make_inputs(config, seed=SEED)
    # Larger embeddings make the model prefer some tokens strongly.
    params["model.embed_tokens.weight"] *= 10
    metadata = {key: str(value) for key, value in asdict(config).items()}
    metadata |= {"rope_theta": str(ROPE_THETA), "norm_eps": str(NORM_EPS)}
    save_file(params, HERE / "lm_eval_reference.safetensors", metadata)

    lm = HFLM(
        pretrained=Reference(params, config),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT),
        max_length=SEQ,
        batch_size=1,
        device="cpu",
    )
    manager = TaskManager()
    results = []
    with tempfile.TemporaryDirectory() as directory:
        for file, columns, task in FILES:
            loaded = load_task(manager, task, columns(read(file)), directory)
            output = evaluator.evaluate(lm, loaded)
            (name,) = loaded["tasks"]
            scores = output["results"][name]
            means = {key: scores[f"{key},none"] for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")}
            questions = [question(lm, sample) for sample in output["samples"][name]]
            results.append({"file": file, "lm_eval": lm_eval.__version__, **means, "questions": questions})
            print(file, means)
    lines = [json.dumps(result, ensure_ascii=False) + "\n" for result in results]
    (HERE / "lm_eval_reference.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
