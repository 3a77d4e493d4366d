"""What a user may ask of Adafactor, for hypothesis: values that have a meaning, each by itself."""

from __future__ import annotations

from hypothesis import strategies as st

from adashard.knobs import SEMANTICS

numbers = st.floats(0, 1e6) | st.integers(0, 10)
all_knobs = st.fixed_dictionaries(
    {
        "lr": st.none() | numbers,
        "eps": st.none() | st.tuples(st.none() | numbers, st.none() | numbers),
        "clip_threshold": st.none() | st.floats(0, exclude_min=True, allow_nan=False),
        "decay_rate": st.none() | st.floats(-2, 0),
        "beta1": st.none() | st.floats(0, 1, exclude_max=True),
        "weight_decay": st.none() | numbers,
        "scale_parameter": st.none() | st.booleans(),
        "relative_step": st.none() | st.booleans(),
        "warmup_init": st.none() | st.booleans(),
        "eps_placement": st.none() | st.sampled_from(["added", "clamped"]),
        "factored_axes": st.none() | st.sampled_from(["last_two", "largest_two"]),
        "min_dim_size_to_factor": st.none() | st.integers(1, 128),
        "weight_decay_mode": st.none() | st.sampled_from(["alpha", "lr", "plain"]),
        "step_offset": st.none() | st.integers(0, 10**9),
    }
)
all_semantics = st.sampled_from(list(SEMANTICS))
