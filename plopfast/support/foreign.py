"""Settings that other tools have and plopfast does not, each with the reason."""

from collections.abc import Sequence

from .errors import nearest

_LOW_RANK = "plopfast trains low-rank updates alone"
_READ = "adapters of PEFT that hold it are loaded, evaluated and merged"
WHY_NOT = {
    "modules_to_save": f"{_LOW_RANK}, no whole modules; {_READ}",
    "bias": f"{_LOW_RANK}, no biases; {_READ}",
    "trainable_token_indices": f"{_LOW_RANK}, no rows of the embedding",
    "lora_bias": f"{_LOW_RANK}, and these have no bias",
    "layer_replication": "plopfast trains the layers that the model has",
}


def hint(name: str, known: Sequence[str]) -> str:
    """The end of an error about an unknown setting: why there is none, or the most similar known one, or nothing."""
    why = WHY_NOT.get(name.strip("-").partition("=")[0].replace("-", "_"))
    return f": {why}" if why else nearest(name, known)
