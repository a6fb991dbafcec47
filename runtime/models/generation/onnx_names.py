"""What the inputs and outputs of a graph are called: ssmc's own names, and those onnxruntime-genai looks for."""

from __future__ import annotations

PAST, PRESENT = "past_", "present_"
PAST_GENAI, PRESENT_GENAI = "past_key_values.", "present."
GROWS, TOTAL = "past", "total"
"""Names of the axis along which a state grows by the tokens of a call, before and after them."""
STATES_GENAI = {"conv": "conv_state", "ssm": "recurrent_state", "key": "key", "value": "value"}


def present_name(past: str) -> str:
    """The output that gives a state after the tokens, from the name of the input that takes it before them."""
    if past.startswith(PAST_GENAI):
        return PRESENT_GENAI + past.removeprefix(PAST_GENAI)
    return PRESENT + past.removeprefix(PAST)
