"""``specbatch run`` and ``specbatch resume``."""

from __future__ import annotations

from specbatch.verbs.options import config_verb, in_file, read_config, run_verb_known


def run(arguments: list[str]) -> int:
    """Run all components on this machine, from conversations to a measured draft."""
    options, rest = config_verb(run, arguments)
    config = read_config(options, rest)
    if config is None:
        return 0
    from specbatch.launch import local

    with in_file(options.config):
        return local.run(config)


def resume(arguments: list[str]) -> int:
    """Go on with a run where its newest snapshot stands, also with settings that make no other training of it."""
    from specbatch.config.change import may_change
    from specbatch.config.load import config_options

    fields = {name: option for name, option in config_options().items() if may_change(name)}
    options, rest = run_verb_known(resume, arguments, lambda parser: None, fields)
    from specbatch.launch import local

    return local.resume(options.run, rest)
