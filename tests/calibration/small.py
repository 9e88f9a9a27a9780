"""A preset smaller than any shipped one: a family in seconds."""

from __future__ import annotations

from calibration.training.presets import ModelPlan, Preset

FAMILY = Preset(
    name="test",
    models=(
        ModelPlan("code-2l", {"code": 1.0}, 2, 32, 2, 64, (1, 2), 0.5),
        ModelPlan("mixed-4l", {"code": 0.5, "prose": 0.5}, 4, 32, 2, 64, (1, 2, 4), 0.5),
    ),
    iterations=60,
    window_tokens=48,
    rows=4,
    long_window_tokens=96,
    long_rows=2,
    long_share=0.25,
    learning_rate=1e-2,
    early_weight=0.5,
    budget_s=60.0,
    held_out_tokens=2048,
    max_train_bytes=60_000,
)
