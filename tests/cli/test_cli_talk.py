"""The conversation at a terminal, with a voice that is not a model."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import pytest

from treadle.cli.talk import Message, Talk
from treadle.core.errors import TreadleError
from treadle.inference.request import Delta


class Echo:
    """Says the last turn back, a word at a time; its context holds `room` messages."""

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.heard: list[list[Message]] = []
        self.closed = 0

    def fits(self, messages: Sequence[Message]) -> bool:
        return len(messages) <= self.room

    def answer(self, messages: Sequence[Message]) -> Generator[Delta]:
        self.heard.append(list(messages))
        try:
            for number, word in enumerate(messages[-1]["content"].split()):
                if word == "CTRL-C":
                    os.kill(os.getpid(), signal.SIGINT)
                if word == "BROKEN":
                    raise TreadleError("the thread broke")
                yield Delta(f"{word} ", (number,))
        finally:
            self.closed += 1


class Screen:
    """What is typed, and what is shown."""

    def __init__(self, *typed: str | type[BaseException]) -> None:
        self.typed: Iterator[str | type[BaseException]] = iter(typed)
        self.shown = ""
        self.remarks: list[str] = []

    def read(self, prompt: str) -> str:
        line = next(self.typed, EOFError)
        if isinstance(line, str):
            return line
        raise line


def talk(
    *typed: str | type[BaseException], voice: Echo | None = None, system: str | None = None
) -> tuple[Talk, Screen, Echo]:
    screen, voice = Screen(*typed), voice or Echo()

    def write(text: str) -> None:
        screen.shown += text

    result = Talk(voice, read=screen.read, write=write, remark=screen.remarks.append, system=system)
    result.run()
    return result, screen, voice


def test_each_turn_sees_the_ones_before() -> None:
    result, screen, voice = talk("one", "  ", "two", system="be brief")
    assert screen.shown == "one \ntwo \n"
    assert [m["content"] for m in voice.heard[1]] == ["be brief", "one", "one ", "two"]
    assert [m["role"] for m in result.messages] == [
        "system",
        *("user", "assistant", "user", "assistant"),
    ]


def test_reset_keeps_the_system_prompt() -> None:
    _, _, voice = talk("one", "/reset", "two", system="be brief")
    assert [m["content"] for m in voice.heard[1]] == ["be brief", "two"]


def test_system_begins_a_new_conversation() -> None:
    result, screen, _ = talk("one", "/system rhyme", "/system")
    assert result.messages == [{"role": "system", "content": "rhyme"}]
    assert screen.remarks[-1] == "rhyme"


def test_save_appends_a_line_that_training_reads(tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    talk("one", f"/save {file}", "/reset", "zwei", f"/save {file}")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["messages"][0]["content"] for line in lines] == ["one", "zwei"]
    assert [m["role"] for m in lines[0]["messages"]] == ["user", "assistant"]


def test_save_needs_a_name_and_a_place() -> None:
    _, screen, _ = talk("/save", "/save /proc/nowhere/x", "still here")
    assert "name a file" in screen.remarks[0]
    assert screen.remarks[1].startswith("error: ")
    assert screen.shown == "still here \n"


def test_several_lines_between_quotes_are_one_turn() -> None:
    _, _, voice = talk('"""first', "second", 'third"""', '"""', "a", '"""', '"""one line"""')
    assert [h[-1]["content"] for h in voice.heard] == ["first\nsecond\nthird", "a", "one line"]


def test_ctrl_c_ends_the_answer_and_not_the_conversation() -> None:
    before = signal.getsignal(signal.SIGINT)
    result, screen, voice = talk("a CTRL-C b c", "two")
    assert screen.shown == "a CTRL-C \ntwo \n"
    assert voice.closed == 2
    assert "stopped" in screen.remarks[0]
    assert result.turns[1] == {"role": "assistant", "content": "a CTRL-C "}
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_at_the_prompt_tells_how_to_leave() -> None:
    _, screen, _ = talk(KeyboardInterrupt, "one", "/exit", "two")
    assert "Ctrl-D leaves" in screen.remarks[0]
    assert screen.shown == "one \n"


def test_a_failed_answer_leaves_no_turn() -> None:
    result, screen, _ = talk("BROKEN", "one")
    assert screen.remarks[0] == "error: the thread broke"
    assert [m["content"] for m in result.turns] == ["one", "one "]


def test_what_does_not_fit_is_forgotten_from_the_start() -> None:
    _, screen, voice = talk("1", "2", "3", voice=Echo(room=4), system="be brief")
    assert [m["content"] for m in voice.heard[2]] == ["be brief", "2", "2 ", "3"]
    assert "2 oldest turns are forgotten" in screen.remarks[2]


@pytest.mark.parametrize(("typed", "hint"), [("/rest", "/reset"), ("/sytem x", "/system")])
def test_a_mistyped_command_gets_a_hint(typed: str, hint: str) -> None:
    _, screen, voice = talk(typed)
    assert f"did you mean `{hint}`?" in screen.remarks[0]
    assert voice.heard == []


def test_help_lists_the_commands() -> None:
    _, screen, _ = talk("/help")
    assert [r.split()[0] for r in screen.remarks] == [
        *("/help", "/reset", "/system", "/save", "/exit")
    ]
