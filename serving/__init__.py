"""What is behind serve.py: answers written in one batch for many callers, in the form of OpenAI's protocol."""
