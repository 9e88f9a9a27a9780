"""Folders named after labels."""

from __future__ import annotations

from helios_sim.folder_names import folder_name, folder_names


def test_a_label_becomes_a_plain_folder_name() -> None:
    assert folder_name("EE-single (wait), 1.3B") == "ee-single-wait-1.3b"
    assert folder_name("azure_chat") == "azure_chat"
    assert folder_name("...") == "run"


def test_labels_that_would_share_a_folder_are_numbered() -> None:
    labels = ["early_exit", "A b", "a-b", "a b", "a-b-2"]
    assert folder_names(labels) == ["early_exit", "a-b", "a-b-2", "a-b-3", "a-b-2-2"]
