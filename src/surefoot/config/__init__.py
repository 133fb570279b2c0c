"""The whole configuration as typed, strict models. Imports no torch.

A run is one `Config`: read from YAML, overridden by flags, checked here before anything heavy starts, and
written into the run folder with the sections of its kind. Fields' descriptions make up `docs/config.md`.
"""

from surefoot.config.env import EnvConfig, SelfPlayConfig
from surefoot.config.fields import Section
from surefoot.config.files import (
    absolute_paths,
    dump_config,
    load_config,
    make_config,
    make_paths_relative_to,
    read_sections,
    sections_for,
    set_field,
    with_sampling,
)
from surefoot.config.keywords import nested, setting_keys
from surefoot.config.kinds import SUPERVISED
from surefoot.config.policy import NETWORKS, AdapterConfig, CriticConfig, NetworkConfig, PolicyConfig
from surefoot.config.ppo import GroupConfig, KLConfig, PPOConfig, ShapingConfig
from surefoot.config.rollout import GenerationConfig, RejectionSamplingConfig, RolloutConfig
from surefoot.config.root import Config, EvaluateConfig, RunConfig
from surefoot.config.supervised import DPOConfig, NewModelConfig, PTXConfig, RewardModelConfig, SFTConfig
from surefoot.config.tables import default_text, field_table, with_settings
from surefoot.config.task import RewardPart, TaskConfig, check_weights
