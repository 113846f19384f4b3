"""What configurations of published models say, and what they leave unsaid."""

import diffusers
import pytest
import transformers

from inversion_dpo.models.base import ModelError
from inversion_dpo.models.intact import check_settings

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02}
SHIFTS = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256}
SHIFTS |= {"max_image_seq_len": 4096, "use_dynamic_shifting": True}
PUBLISHED = {  # class, and the keys that matter here of those that the file has
    "sd-1.4 vae": (
        diffusers.AutoencoderKL,
        {"_diffusers_version": "0.2.2", "act_fn": "silu", "latent_channels": 4},
    ),
    "sd-1.5 vae": (
        diffusers.AutoencoderKL,
        {"_diffusers_version": "0.6.0", "latent_channels": 4, "norm_num_groups": 32},
    ),
    "sd3 scheduler": (
        diffusers.FlowMatchEulerDiscreteScheduler,
        {"_diffusers_version": "0.29.0.dev0", "num_train_timesteps": 1000, "shift": 3.0},
    ),
    "z-image scheduler": (
        diffusers.FlowMatchEulerDiscreteScheduler,
        {"num_train_timesteps": 1000, "use_dynamic_shifting": False, "shift": 3.0},
    ),
    "flux scheduler": (
        diffusers.FlowMatchEulerDiscreteScheduler,
        SHIFTS | {"num_train_timesteps": 1000, "shift": 3.0},
    ),
    "wan scheduler": (
        diffusers.UniPCMultistepScheduler,
        BETAS
        | {"beta_schedule": "linear", "trained_betas": None, "use_flow_sigmas": True}
        | {"flow_shift": 3.0, "prediction_type": "flow_prediction"},
    ),
    "sdxl text_encoder_2": (
        transformers.CLIPTextConfig,
        {"hidden_act": "gelu", "num_attention_heads": 20},
    ),
    "flux text_encoder_2": (
        transformers.T5Config,
        {"feed_forward_proj": "gated-gelu", "num_heads": 64, "is_gated_act": True},
    ),
    "z-image text_encoder": (
        transformers.Qwen3Config,
        {"hidden_act": "silu", "num_attention_heads": 32, "rope_scaling": None}
        | {"rope_theta": 1000000},
    ),
}
MATTER = [  # without it the library takes a value that no weight contradicts
    ("sd-1.5 vae", "norm_num_groups"),
    ("flux scheduler", "use_dynamic_shifting"),
    ("flux scheduler", "max_shift"),
    ("wan scheduler", "flow_shift"),
    ("wan scheduler", "prediction_type"),
    ("sdxl text_encoder_2", "hidden_act"),
    ("flux text_encoder_2", "feed_forward_proj"),
    ("z-image text_encoder", "rope_theta"),
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_a_published_file_leaves_unsaid_is_taken(name):
    kind, about = PUBLISHED[name]
    check_settings(name, kind, about)


@pytest.mark.parametrize(("name", "lost"), MATTER)
def test_what_published_files_say_is_missed(name, lost):
    kind, about = PUBLISHED[name]
    short = {key: value for key, value in about.items() if key != lost}
    with pytest.raises(ModelError, match=f"{name} does not say .*: fetch it again"):
        check_settings(name, kind, short)
