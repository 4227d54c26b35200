"""Personas: who is told what, and voices around answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_env import Numbered, chat_env

from treadle.core.errors import ConfigError
from treadle.data.persona import Persona, Voiced, told_who
from treadle.data.records import Chat, Message, user
from treadle.data.supervised import Supervised

PLAIN = Numbered(word="loom", amount=9)
VOICED = Voiced(conversations=PLAIN, openings=("Arr!", "Ahoy!"), closings=("Aye.", "So."))
PERSONA = Persona(who="You are a sailor.", styled=VOICED, plain=PLAIN, share=0.3)


def said(chat: Chat) -> tuple[tuple[str, str], ...]:
    return tuple((message.role, message.content) for message in chat.messages)


def test_told_and_untold_by_hand() -> None:
    """Exactly the styled conversations have the system message, and they are `share` of all."""
    chats = [PERSONA.conversation(i) for i in range(1500)]
    plain = {said(PLAIN.conversation(i)) for i in range(9)}
    styled = {said(VOICED.conversation(i)) for i in range(9)}
    told = [chat for chat in chats if chat.messages[0] == Message("system", "You are a sailor.")]
    assert len(told) == pytest.approx(450, abs=60)
    assert {said(Chat(chat.messages[1:])) for chat in told} == styled
    assert {said(chat) for chat in chats if chat.messages[0].role != "system"} == plain
    assert PERSONA.count() is None
    assert chats == [PERSONA.conversation(i) for i in range(1500)]
    assert chats != [PERSONA.replace(seed=1).conversation(i) for i in range(1500)]
    assert PERSONA.replace(share=1.0).conversation(3).messages[0].role == "system"


def test_voices_come_in_turn() -> None:
    said = [VOICED.conversation(i).messages[-1].content.split("\n") for i in range(5)]
    assert [parts[0] for parts in said] == ["Arr!", "Ahoy!", "Arr!", "Ahoy!", "Arr!"]
    assert [parts[2] for parts in said] == ["Aye.", "Aye.", "So.", "So.", "Aye."]
    assert [parts[1] for parts in said] == [
        PLAIN.conversation(i).messages[-1].content for i in range(5)
    ]
    assert VOICED.count() == 9


def test_the_system_message_is_read_and_not_learned(tmp_path: Path) -> None:
    env = chat_env(tmp_path)
    source = Supervised(conversations=PERSONA.replace(share=1.0), per_step=2)
    (batch,) = next(source.open(env)).batches
    assert "sailor" in env.tokenizer.decode(batch.tokens.tolist())
    assert "sailor" not in env.tokenizer.decode(batch.targets.tolist())


def test_two_system_messages_are_refused() -> None:
    with pytest.raises(ConfigError, match="has a system message of its own"):
        told_who(Chat((Message("system", "Be brief."), user("Why?"))), "A sailor.")
