"""HELIOS as pure functions of snapshots, its baselines, and the memory a host keeps for them."""

from helios_sim.policy.controller import Controller
from helios_sim.policy.helios import Helios, HeliosSettings
from helios_sim.policy.registry import (
    hot_rules_of,
    make_policy,
    option_grades,
    policy_names,
    policy_options,
)
from helios_sim.policy.snapshot_json import (
    read_snapshots,
    snapshot_from_json,
    snapshot_to_json,
)

__all__ = [
    "Controller",
    "Helios",
    "HeliosSettings",
    "hot_rules_of",
    "make_policy",
    "option_grades",
    "policy_names",
    "policy_options",
    "read_snapshots",
    "snapshot_from_json",
    "snapshot_to_json",
]
