"""Talk to an exported model: a chat in the terminal."""
