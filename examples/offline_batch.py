"""Ask one question about many image files, on several processes; a killed run goes on when it is started again.

    accelerate launch --num_processes 2 examples/offline_batch.py --images FOLDER --question TEXT --output FOLDER
    torchrun --standalone --nproc-per-node 2 examples/offline_batch.py …     # several processes on CPUs
    python examples/offline_batch.py                  # one process; without --images, pieces of a page

Answers lie in parquet files (pyarrow: extra `stages` or `train`), each written whole or not at all, and are not asked
for again, also when files or processes came in. An unreadable image gets a row with its error, until the next run.
"""

import hashlib
from pathlib import Path

import pyarrow
import torch
from accelerate import PartialState
from common import FINE, OUT, arguments, as_utf8, demo_images, folder, positive, read_rows, write_rows
from transformers import AutoModelForImageTextToText, AutoProcessor


SCHEMA = pyarrow.schema(
    [(name, pyarrow.string()) for name in ("file", "question", "model", "answer", "reason", "error")]
    + [("gate_probability", pyarrow.float64()), ("visual_tokens", pyarrow.int64())]
    + [("box", pyarrow.list_(pyarrow.int64()))]
)
options = arguments(
    __doc__,
    images={"type": folder, "help": "folder, searched with all its subfolders"},
    question={"default": FINE},
    output={"type": Path, "default": OUT / "answers"},
    batch_size={"type": positive, "default": 4},
    rows_per_file={"type": positive, "default": 64, "help": "a stop loses at most so many answers of each process"},
)
task = {"question": options.question, "model": options.model}  # other questions and models may share the folder
state = PartialState(cpu=not torch.accelerator.is_available())  # which of how many processes this is, and its device
with state.main_process_first():
    images = options.images or demo_images()
    options.output.mkdir(parents=True, exist_ok=True)
    done = set()
    for path in options.output.glob("*.parquet"):
        earlier = read_rows(path, SCHEMA)
        same = [row for row in earlier if {name: row[name] for name in task} == task]
        again = [row for row in same if row["error"] is not None]  # to be asked again
        if again:
            write_rows([row for row in earlier if row not in again], SCHEMA, path)
        done |= {row["file"] for row in same if row not in again}
output = options.output.resolve()
paths = [path for path in images.rglob("*") if path.is_file() and output not in path.resolve().parents]
files = {as_utf8(path.relative_to(images).as_posix()): path for path in sorted(paths)}
if not files:
    raise SystemExit(f"error: there is no file in {images}")
missing = [name for name in files if name not in done]
state.wait_for_everyone()  # nobody writes before everybody has read, so that all share out the same list
own = missing[state.process_index :: state.num_processes]
known = len(files) - len(missing)
state.print(f"{len(files)} files, {known} done, {len(missing)} to do on {state.num_processes} processes")

model = AutoModelForImageTextToText.from_pretrained(options.model, trust_remote_code=True, device_map=state.device)
processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)


def answer(names: list[str]) -> list[dict]:
    """Rows of a batch; asked one by one if something is wrong with an image, to find out with which."""
    text = {"type": "text", "text": options.question}
    contents = [[{"type": "image", "image": str(files[name])}, text] for name in names]
    try:
        inputs = processor.apply_chat_template(
            [[{"role": "user", "content": content}] for content in contents],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
    except (OSError, ValueError) as error:
        if len(names) > 1:
            return [row for name in names for row in answer([name])]
        return [{"file": names[0], "error": as_utf8(str(error)), **task}]
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False, return_zoom_reports=True)
    texts = processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    rows = []
    for name, reply, report in zip(names, texts, output.zoom_reports):
        zoom = {"reason": report.reason, "gate_probability": report.gate_probability, "box": report.box}
        tokens = report.coarse_tokens + report.crop_tokens
        rows.append({"file": name, "answer": reply, "visual_tokens": tokens, **zoom, **task})
    return rows


for start in range(0, len(own), options.rows_per_file):
    part = own[start : start + options.rows_per_file]
    rows = []
    for first in range(0, len(part), options.batch_size):
        rows += answer(part[first : first + options.batch_size])
    # no other file is about the same question and the same images, so none has this name
    key = hashlib.sha256(repr((part, task)).encode()).hexdigest()[:16]
    write_rows(rows, SCHEMA, options.output / f"{key}.parquet")
    failed = sum("error" in row for row in rows)
    print(f"process {state.process_index}: {start + len(part)} of {len(own)}, {failed} unreadable", flush=True)
state.wait_for_everyone()
state.print(f"answers in {options.output}")
state.destroy_process_group()
