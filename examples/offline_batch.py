"""Ask one question about many image files, on several processes; a killed run goes on when it is started again.

    accelerate launch --num_processes 2 examples/offline_batch.py --images FOLDER --question TEXT --output FOLDER
    torchrun --standalone --nproc-per-node 2 examples/offline_batch.py …     # several processes on CPUs
    python examples/offline_batch.py                  # one process; without --images, pieces of a page

Answers lie in parquet files, each written whole or not at all. What one of them holds is not asked again, also when
files were added or the number of processes has changed. An image that cannot be read gets a row with its error.
"""

import hashlib
from pathlib import Path

import pyarrow
import torch
from accelerate import PartialState
from common import FINE, OUT, arguments, demo_images
from pyarrow import parquet
from transformers import AutoModelForImageTextToText, AutoProcessor


SCHEMA = pyarrow.schema(
    [(name, pyarrow.string()) for name in ("file", "question", "model", "answer", "reason", "error")]
    + [("gate_probability", pyarrow.float64()), ("visual_tokens", pyarrow.int64())]
    + [("box", pyarrow.list_(pyarrow.int64()))]
)
options = arguments(
    __doc__,
    images={"type": Path, "help": "folder, searched with all its subfolders"},
    question={"default": FINE},
    output={"type": Path, "default": OUT / "answers"},
    batch_size={"type": int, "default": 4},
    rows_per_file={"type": int, "default": 64, "help": "a stop loses at most so many answers of each process"},
)
asked = {"question": options.question, "model": options.model}  # other questions and models may share the folder
state = PartialState(cpu=not torch.accelerator.is_available())  # which of how many processes this is, and its device
with state.main_process_first():
    folder = options.images or demo_images()
    options.output.mkdir(parents=True, exist_ok=True)

done = set()
for path in options.output.glob("*.parquet"):
    for row in parquet.read_table(path, columns=["file", *asked]).to_pylist():
        done |= {row["file"]} if {name: row[name] for name in asked} == asked else set()
names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
missing = [name for name in names if name not in done]
state.wait_for_everyone()  # nobody writes before everybody has read, so that all share out the same list
own = missing[state.process_index :: state.num_processes]
state.print(f"{len(names)} files, {len(done)} done, {len(missing)} to do on {state.num_processes} processes")

model = AutoModelForImageTextToText.from_pretrained(
    options.model, trust_remote_code=True, device_map={"": state.device}
)
processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)


def answer(files: list[str]) -> list[dict]:
    """Rows of a batch; asked one by one if something is wrong with an image, to find out with which."""
    text = {"type": "text", "text": options.question}
    contents = [[{"type": "image", "image": str(folder / name)}, text] for name in files]
    try:
        inputs = processor.apply_chat_template(
            [[{"role": "user", "content": content}] for content in contents],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
    except (OSError, ValueError) as error:
        if len(files) > 1:
            return [row for name in files for row in answer([name])]
        return [{"file": files[0], "error": str(error), **asked}]
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False, return_zoom_reports=True)
    texts = processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    rows = []
    for name, reply, report in zip(files, texts, output.zoom_reports):
        zoom = {"reason": report.reason, "gate_probability": report.gate_probability, "box": report.box}
        tokens = report.coarse_tokens + report.crop_tokens
        rows.append({"file": name, "answer": reply, "visual_tokens": tokens, **zoom, **asked})
    return rows


for start in range(0, len(own), options.rows_per_file):
    part = own[start : start + options.rows_per_file]
    rows = []
    for first in range(0, len(part), options.batch_size):
        rows += answer(part[first : first + options.batch_size])
    # no two parts begin with the same question about the same file, so no two have one name
    key = hashlib.sha256(repr((part[0], asked)).encode()).hexdigest()[:16]
    partial = options.output / f"{key}.partial"
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA), partial)
    partial.replace(partial.with_suffix(".parquet"))
    print(f"process {state.process_index}: {start + len(part)} of {len(own)}", flush=True)
state.wait_for_everyone()
state.print(f"answers in {options.output}")
state.destroy_process_group()
