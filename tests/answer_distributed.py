"""What `test_train_distributed.py` runs on two processes: the checkpoint at the root answers DATA's held-out questions.

Each rank writes OUT/{rank}.json: (scores, how many questions it answered itself).
"""

# ruff: noqa: E402, I001  a script of its own: the path comes first, then the package that other imports are from

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from accelerate import PartialState

from depthvlm.modeling_depthvlm import DepthVLMForConditionalGeneration
from depthvlm.processing_depthvlm import DepthVLMProcessor
from training import questions
from training.data import DataArguments, DataSource

ROWS = 2


def answer(data: str) -> tuple[dict[str, float], int]:
    model = DepthVLMForConditionalGeneration.from_pretrained(ROOT, dtype="float32")
    processor = DepthVLMProcessor.from_pretrained(ROOT, trust_remote_code=False)
    source = DataSource(data, name="procedural_easy", split="test", kind="qa")
    generate, answered = questions.generate_answers, []
    questions.generate_answers = lambda model, processor, rows, *rest: (
        answered.extend(rows) or generate(model, processor, rows, *rest)
    )
    scores = questions.score_questions(model, processor, DataArguments([], eval_datasets=[source]), ROWS)
    questions.generate_answers = generate
    return scores, len(answered)


if __name__ == "__main__":
    data, output = sys.argv[1:]
    state = PartialState(cpu=True)
    Path(output, f"{state.process_index}.json").write_text(json.dumps(answer(data)))
