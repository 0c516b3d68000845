"""Every config of real data, in its smoke form, on the real files and teacher."""

import json
import pathlib

import numpy as np
import pytest

from kdjax import train, validation
from tests.test_config import load

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


@pytest.mark.real_data
@pytest.mark.parametrize("argument", ["smoke", "smoke,hard"])
@pytest.mark.parametrize("name", ["smollm2_gsm8k", "smollm2_csqa"])
def test_smoke(name, argument, real_data, smollm2, tmp_path):
    config = load(CONFIGS / f"{name}.py", argument)
    folder = real_data / ("gsm8k" if "gsm8k" in name else "commonsense_qa")
    config.data.path = str(folder / "train.jsonl")
    config.data.eval_path = str(
        folder / ("test.jsonl" if "gsm8k" in name else "dev.jsonl")
    )
    if config.data.rationales:
        config.data.rationales = str(folder / "palm_train.jsonl")
        config.data.eval_rationales = str(folder / "palm_dev.jsonl")
    config.teacher.path = str(smollm2)
    config.train.batch_size = config.evaluation.batch_size = 8  # one row a device
    validation.validate(config)
    train.run(config, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for model in ("teacher", "student"):
        assert np.isfinite(summary[model]["nll"]) and np.isfinite(summary[model]["kl"])
    assert 0 <= summary["teacher"]["kl"] < 1e-3
    assert summary["teacher"]["agreement"] > 0.99
    if "csqa" in name:
        assert 0 <= summary["teacher"]["accuracy"] <= 1
