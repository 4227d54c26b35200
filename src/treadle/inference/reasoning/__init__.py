"""Strategies that spend tokens on an answer: prompts, votes, searches, revisions, budgets."""
