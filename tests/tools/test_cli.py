"""The command: every sub-command explains itself, and mistakes are one line."""

import subprocess
import sys

import pytest

from densezoo.tools.cli import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: densezoo {command}" in text
    assert f"example:\n  densezoo {command}" in text


def test_all_commands_are_listed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    listed = {line.split()[0] for line in text.splitlines() if line.startswith("    ")}
    assert set(COMMANDS) <= listed


def test_a_mistake_is_one_line_and_debug_shows_where_it_was_made(capsys):
    assert main(["macs", "cas_vit_xx"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("densezoo macs: error: unknown model 'cas_vit_xx': did you mean cas_vit_")
    with pytest.raises(ValueError, match="cas_vit_xx"):
        main(["macs", "cas_vit_xx", "--debug"])


def test_tools_run_as_modules():
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "densezoo.tools.list_models"]
    run = subprocess.run([*command, "--filter", "cas_vit_s"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "cas_vit_s " in run.stdout and "cas_vit_xs" not in run.stdout and run.stderr == ""
