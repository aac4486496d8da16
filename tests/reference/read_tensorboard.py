#!/usr/bin/env python3
"""Reads a run directory with TensorBoard's own EventAccumulator and prints what it found as JSON.

    python3 -m venv venv && venv/bin/pip install tensorboard
    venv/bin/python tests/reference/read_tensorboard.py RUN_DIR

Output: {"scalars": {tag: [[step, value], ...]}, "texts": {tag: [[step, text], ...]}}
"""

import json
import sys

from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator

EVERYTHING = {SCALARS: 0, TENSORS: 0}  # 0: keep every event, do not sample

events = EventAccumulator(sys.argv[1], size_guidance=EVERYTHING)
events.Reload()
tags = events.Tags()
is_text = lambda tag: events.SummaryMetadata(tag).plugin_data.plugin_name == "text"
print(
    json.dumps(
        {
            "scalars": {tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in tags["scalars"]},
            "texts": {
                tag: [[e.step, e.tensor_proto.string_val[0].decode()] for e in events.Tensors(tag)]
                for tag in tags["tensors"]
                if is_text(tag)
            },
        }
    )
)
