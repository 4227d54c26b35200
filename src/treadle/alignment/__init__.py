"""Rewards, rollouts and reinforcement."""
