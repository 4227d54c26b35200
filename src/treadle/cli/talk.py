"""The conversation at a terminal: reads turns, streams answers, obeys a few slash commands."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import typer

from treadle.core.errors import TreadleError, did_you_mean
from treadle.core.files import write_text

if TYPE_CHECKING:
    from collections.abc import Generator

    from treadle.inference.request import Delta

Message = dict[str, str]
QUOTES = '"""'
HELP = {
    "/help": "these lines",
    "/reset": "forget the conversation, keep the system prompt",
    "/system [TEXT]": "set the system prompt and begin again; without TEXT, show it",
    "/save FILE": "append the conversation to FILE as one line of JSON",
    "/exit": "leave; so does Ctrl-D",
}


class Voice(Protocol):
    """What answers."""

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether the model's context holds the messages and an answer."""

    def answer(self, messages: Sequence[Message]) -> Generator[Delta]:
        """The pieces of the next assistant turn; closing it ends the answer."""


class Talk:
    """A conversation.

    Args:
        read: asks for a line with a prompt; raises EOFError at the end.
        write: shows text of the answer at once.
        remark: shows a line that is not part of the answer.
    """

    def __init__(
        self,
        voice: Voice,
        *,
        read: Callable[[str], str],
        write: Callable[[str], None],
        remark: Callable[[str], None],
        system: str | None = None,
    ) -> None:
        self.voice, self.read, self.write, self.remark = voice, read, write, remark
        self.system = system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """The system prompt and the turns so far."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]

    def run(self) -> None:
        """Until the user leaves."""
        while True:
            try:
                text = self._turn().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.remark("(/exit or Ctrl-D leaves)")
                continue
            if text == "/exit":
                return
            try:
                if text.startswith("/"):
                    self._obey(text)
                elif text:
                    self._answer(text)
            except (TreadleError, OSError) as error:
                self.remark(f"error: {error}")

    def _turn(self) -> str:
        """A line, or several between lines of three quotes; a pasted text comes as one."""
        text = self.read("you> ")
        if not text.strip().startswith(QUOTES):
            return text
        lines = [text.strip().removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(self.read("...> "))
        return "\n".join(lines).strip().removesuffix(QUOTES)

    def _obey(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            for command, does in HELP.items():
                self.remark(f"{command:15} {does}")
        elif name == "/reset":
            self.turns.clear()
            self.remark("(forgotten)")
        elif name == "/system" and rest:
            self.system = rest
            self.turns.clear()
            self.remark("(a new conversation with this system prompt)")
        elif name == "/system":
            self.remark(self.system or "(no system prompt)")
        elif name == "/save":
            self._save(rest)
        else:
            known = [command.partition(" ")[0] for command in HELP]
            self.remark(f"no command {name}{did_you_mean(name, known)}")

    def _save(self, name: str) -> None:
        if not name:
            raise TreadleError("name a file: /save talk.jsonl")
        path = Path(name).expanduser()
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        line = json.dumps({"messages": self.messages}, ensure_ascii=False)
        write_text(path, f"{before}{line}\n")
        self.remark(f"({len(self.messages)} messages saved to {path})")

    def _answer(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})
        answered = ""
        try:
            self._forget_what_does_not_fit()
            answered = self._stream()
        finally:
            if answered:
                self.turns.append({"role": "assistant", "content": answered})
            else:
                self.turns.pop()

    def _forget_what_does_not_fit(self) -> None:
        forgotten = 0
        while len(self.turns) > 2 and not self.voice.fits(self.messages):
            del self.turns[:2]
            forgotten += 2
        if forgotten:
            self.remark(f"(the context is full: the {forgotten} oldest turns are forgotten)")

    def _stream(self) -> str:
        text, tokens, start = "", 0, time.monotonic()
        with _patient() as interrupted, closing(self.voice.answer(self.messages)) as pieces:
            for piece in pieces:
                text, tokens = text + piece.text, tokens + len(piece.tokens)
                self.write(piece.text)
                if interrupted.is_set():
                    break
        self.write("\n")
        rate = tokens / max(time.monotonic() - start, 1e-9)
        end = ", stopped" if interrupted.is_set() else ""
        self.remark(f"({tokens} tokens, {rate:.1f}/s{end})")
        return text


@contextmanager
def _patient() -> Iterator[threading.Event]:
    """Ctrl-C asks the answer to end between two tokens; a second one interrupts at once."""
    asked = threading.Event()

    def handle(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def at_terminal(voice: Voice, system: str | None) -> Talk:
    """A conversation on standard input and output, with line editing and history."""
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):
            import readline

            if "libedit" not in (readline.__doc__ or ""):
                # A pasted text of several lines arrives as one turn.
                readline.parse_and_bind("set enable-bracketed-paste on")

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def remark(line: str) -> None:
        typer.secho(line, dim=True, err=True)

    read = input if interactive else lambda prompt: input()
    return Talk(voice, read=read, write=write, remark=remark, system=system)
