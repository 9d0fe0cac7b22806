"""Train the region branch on your own data: python examples/train_own_data.py [--data FILE.jsonl] [--steps N]

Data is a JSONL file with `image` (a path relative to the file), `question` and, for calibration, `answer`; boxes are
not needed. Without --data, a few pages are drawn as a stand-in. Each stage is what `python -m modeling_qzoom.training
STAGE name=value …` runs; one that was stopped goes on where it was. The gate is trained in the same way, by the stages
label-gates and train-gate. Needs the extra `stages` or `train`.
"""

import json
import random
import sys
from pathlib import Path

from common import OUT, arguments, file, positive

from modeling_qzoom.data.drawn.questions import ask_question, draw_page
from modeling_qzoom.training.__main__ import main as run_stage


def draw_data(folder: Path, pages: int) -> Path:
    """Stands in for your own pages and questions."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(pages):
        page, rng = draw_page(seed, kind="scene", split="train"), random.Random(seed)
        page.image.save(folder / f"{seed}.png")
        for kind in ("coarse", "fine"):
            question = ask_question(page, kind, rng)
            row = {"id": f"{seed}-{kind}", "image": f"{seed}.png", "question": question.text}
            rows.append({**row, "answer": question.answer})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


options = arguments(
    __doc__,
    data={"type": file},
    steps={"type": positive, "default": 4},
    output={"type": Path, "default": OUT / "training"},
)
out = options.output
data = options.data or draw_data(out / "data", pages=8)
training = {"max_steps": options.steps, "per_device_train_batch_size": 4, "learning_rate": 1e-4, "report_to": "none"}
# reset=false goes on with the branch that the checkpoint has; a plain VLM's is fresh anyway
trainer = ["reset=false", *(f"trainer.{name}={value}" for name, value in training.items())]
stages = {
    # which attention heads look at what a question asks about, and where they look on your data
    "find-heads": [f"model={options.model}", f"output={out}/heads.yaml", "pages=8"],
    "label-regions": [f"model={options.model}", f"data={data}", f"heads={out}/heads.yaml", f"output={out}/regions"],
    # the region branch learns to look there by itself
    "train-regions": [f"model={options.model}", f"labels={out}/regions", f"output={out}/stage1", *trainer],
    # thresholds and the presets fast, balanced and accurate; better on rows that were not trained on
    "calibrate": [f"model={out}/stage1", f"data={data}", f"output={out}/finished", "crop_max_tokens=[64, 144]"],
}
for stage, settings in stages.items():
    print(f"--- python -m modeling_qzoom.training {stage} {' '.join(settings)}", flush=True)
    if run_stage([stage, *settings]) != 0:
        sys.exit(f"error: {stage} failed")
print(f"a checkpoint that loads like the one it began with: {out / 'finished'}")
