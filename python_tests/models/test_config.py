"""Configurations: the original's are read unchanged, wrong ones are refused by key."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from hflow_fast import ConfigError
from hflow_fast.configs import load_config, preset_names
from hflow_fast.models import HFlow, HFlowConfig
from hflow_fast.models.hflow.architecture import read_levels

PRESETS = preset_names("hflow")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    config = HFlowConfig.load(name)
    with torch.device("meta"):
        HFlow(config)
    assert HFlowConfig.load(config.to_dict()) == config


def test_sources_are_equivalent(tmp_path, original_config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(original_config))
    config = HFlowConfig.load(original_config)
    assert HFlowConfig.load(path) == HFlowConfig.load(str(path)) == config
    assert HFlowConfig.load(original_config["MODEL_PARAMETERS"]) == config


def test_endblock_remainder_is_filled_in(original_config):
    assert HFlowConfig.load(original_config).endblock_settings.partitions == [4, 12]


def edited(config: dict, key: str, value) -> dict:
    config = copy.deepcopy(config)
    section, *rest = config["MODEL_PARAMETERS"], *key.split(".")
    for part in rest[:-1]:
        section = section[part]
    if value is None:
        del section[rest[-1]]
    else:
        section[rest[-1]] = value
    return config


@pytest.mark.parametrize(("key", "value", "message"), [
    ("CHANELS", [3, 4, 8], "MODEL_PARAMETERS.CHANELS: unknown key"),
    ("CHANNELS", None, "MODEL_PARAMETERS.CHANNELS: missing key"),
    ("ENDBLOCK_SETTINGS.LAYERS", None, "MODEL_PARAMETERS.ENDBLOCK_SETTINGS.LAYERS: missing key"),
    ("CHANNELS", [3, 4], "CHANNELS has 2 entries, RESOLUTIONS has 3"),
    ("CHANNELS", [1, 4, 8], "with 3 channels"),
    ("CHANNELS", [3, 1, 8], "at least 2 channels"),
    ("CHANNELS", [3, "four", 8], r"MODEL_PARAMETERS.CHANNELS.1: .*\(got 'four'\)"),
    ("RESOLUTIONS", [32, 16, 4], "lowest level must be 8"),
    ("RESOLUTIONS", [64, 8, 8], "64 is followed by 8"),
    ("FLOW_SPLIT_TYPES", ["stripes", "channels", "channels"], "FLOW_SPLIT_TYPES.0: unknown split 'stripes'"),
    ("FLOW_SPLIT_TYPES", ["channels-blocks", "channels", "channels"], "FLOW_SPLIT_TYPES.0: unknown mixture"),
    ("FLOW_SPLIT_TYPES", ["channels", "channels", "hblocks"], "cannot tile resolution 8"),
    ("NUM_LAYERS", [3, 4, 4], "NUM_LAYERS.0 = 3 must be a multiple of 2"),
    ("RNVP_CHANNELS", [7, 8, 12], "must be even"),
    ("POOLING_TYPE", ["pool", "", ""], "'pool' is not a list of"),
    ("AUGMENTATION_TYPES", ["NOISES", "NOISE", "NOISE"], "'NOISES' is not a list of"),
    ("UNET_N_DOWNSCALES", [9, 1, 1], "cannot be halved"),
    ("PERMUTE_SCALING", [0.0, 0.3, 0.3], "must be positive"),
    ("GLOBAL_NET_CHANNELS", 8, "must equal ENDBLOCK_SETTINGS.GLOBAL_STATE_HIDDEN_CHANNELS"),
    ("ENDBLOCK_SETTINGS.ENDRES", 2, "ENDRES"),
    ("ENDBLOCK_SETTINGS.CHANNELS", [15, -1], "does not split"),
    ("ENDBLOCK_SETTINGS.LAYERS", [4], "give one per partition"),
    ("ENDBLOCK_SETTINGS.MASK_FOR_STYLE_IND", [0, 16], "hides the whole code"),
])
def test_mistakes_are_named(original_config, key, value, message):
    with pytest.raises(ConfigError, match=message):
        HFlowConfig.load(edited(original_config, key, value))


def test_all_mistakes_are_listed_together(original_config):
    config = edited(edited(original_config, "CHANNELS", None), "EXTRA", 1)
    with pytest.raises(ConfigError, match="(?s)CHANNELS: missing.*EXTRA: unknown"):
        HFlowConfig.load(config)


def test_what_is_not_a_configuration(tmp_path):
    with pytest.raises(ConfigError, match="neither a file nor a preset; the presets are .*A-128"):
        load_config("A-1024")
    (tmp_path / "broken.json").write_text('{"GENERAL": ')
    with pytest.raises(ConfigError, match="broken.json: not valid JSON"):
        load_config(tmp_path / "broken.json")
    with pytest.raises(ConfigError, match="MODEL_PARAMETERS"):
        load_config({"GENERAL": {}})


@pytest.mark.parametrize("split", ["channels", "spatial", "blocks", "lblocks", "hblocks", "vhalfs", "hhalfs"])
@pytest.mark.parametrize("pooling", ["", "unet_only_reduced", "blocks_only"])
def test_every_split_is_invertible(split, pooling):
    """Also those that no preset uses, with and without a pooling network."""
    config = load_config("tiny-16")
    config["MODEL_PARAMETERS"]["FLOW_SPLIT_TYPES"][0] = split
    config["MODEL_PARAMETERS"]["POOLING_TYPE"][0] = pooling
    torch.manual_seed(0)
    model = HFlow.from_config(config).double()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64) - 0.5
    model.initialize(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        latents, log_det = model.encode(x)
        reconstruction, back = model.decode(latents)
    torch.testing.assert_close(reconstruction, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(back, -log_det)


def test_steps_run_from_image_to_latent():
    """The original numbers steps from latent to image; ours are the other way round."""
    finest = read_levels(HFlowConfig.load("tiny-16"))[0]
    assert [step.coupling.active for step in finest.steps] == ["channels", "checkerboard"]
