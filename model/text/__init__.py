"""Prompt to context: tokenizer, encoder, connector."""
