"""Configuration, cards, run directories, devices and errors: what every room stands on."""
