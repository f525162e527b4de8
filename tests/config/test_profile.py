"""Profiles lie under the user's own configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from specbatch.config import Config, dump_config, load_config
from specbatch.config.profile import profiles
from specbatch.errors import UserError

RUN = "run: {dir: runs/a}\ntarget: {path: some/target}\ndata: {train: [a.jsonl]}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "a.yaml"
    path.write_text(RUN + text)
    return load_config(path, overrides)


def test_each_profile_is_read_and_names_the_pages_that_it_follows(tmp_path):
    assert {"plain", "perlmutter", "lumi", "juwels-booster", "jupiter", "alps", "vista", "lonestar6"} == set(profiles())
    for name, path in profiles().items():
        config = load(tmp_path, f"slurm: {{profile: {name}}}")
        assert config.slurm.inference.gpus_per_node > 0
        assert "https://" in path.read_text()
        assert config.store.protocol == "tcp" or config.store.devices
        text = dump_config(config)
        (tmp_path / "b.yaml").write_text(text)
        assert dump_config(load_config(tmp_path / "b.yaml")) == text


def test_what_the_configuration_says_comes_before_the_profile_and_the_command_line_before_both(tmp_path):
    profile = tmp_path / "mine.yaml"
    profile.write_text(
        "slurm:\n  time: 1:00:00\n  qos: low\n  partition: a\n"
        + "  extra: {requeue: true, mail-type: FAIL}\n  head: {mem: 4G}\nstore: {protocol: rdma, devices: mlx5_0}\n"
    )
    text = "slurm: {profile: mine.yaml, qos: high, extra: {requeue: null}, head: {cpus_per_task: 3}}\n"
    config = load(tmp_path, text, "--slurm.partition=b")
    slurm = config.slurm
    assert (slurm.time, slurm.qos, slurm.partition) == ("1:00:00", "high", "b")
    assert slurm.extra == {"requeue": None, "mail-type": "FAIL"}
    assert (slurm.head.mem, slurm.head.cpus_per_task) == ("4G", 3)
    assert (config.store.protocol, config.store.devices) == ("rdma", "mlx5_0")
    assert slurm.profile == str(profile)


def test_a_mistake_in_a_profile_is_shown_there(tmp_path):
    (tmp_path / "mine.yaml").write_text("slurm:\n  head:\n    cpus_per_task: many\n")
    with pytest.raises(UserError, match=r"mine\.yaml:3: slurm\.head\.cpus_per_task: many is not an integer"):
        load(tmp_path, "slurm: {profile: ./mine.yaml}")
    (tmp_path / "mine.yaml").write_text("run: {seed: 3}\n")
    with pytest.raises(UserError, match=r"mine\.yaml:1: run\.seed: does not belong in a profile"):
        load(tmp_path, "slurm: {profile: ./mine.yaml}")


def test_an_unknown_profile_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"a\.yaml:4: slurm\.profile: there is no profile permutter; did you mean perl"):
        load(tmp_path, "slurm: {profile: permutter}")
    with pytest.raises(UserError, match=r"command line: slurm\.profile: there is no profile xyz; there are alps, "):
        load(tmp_path, "", "--slurm.profile=xyz")
    with pytest.raises(UserError, match=r"nowhere\.yaml: can't be read"):
        load(tmp_path, "slurm: {profile: nowhere.yaml}")
