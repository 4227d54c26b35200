"""Adapters: small trained layers beside a frozen model."""
