"""Settings of frozen models in Hugging Face layout that a run uses beside its base."""

import dataclasses

from pjrlhf.models.quantization import QUANTIZATIONS
from pjrlhf.settings import Settings, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherModelSettings(Settings):
    """A frozen model beside the base, such as a judge or a sampler, which runs on the mesh of the run."""

    path: str = setting("", "its Hugging Face folder, or its name on the hub", path=True)
    dtype: str = setting("float32", "dtype of activations", choices=("float32", "bfloat16"))
    param_dtype: str = setting("float32", "dtype of its parameters", choices=("float32", "bfloat16"))
    quantize: str = setting("", "int8 or nf4 stores its linear layers in 8 or 4 bits", choices=("", *QUANTIZATIONS))
