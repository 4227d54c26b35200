"""Teachers: what they give a student, live or from the disk; students cut out of them."""
