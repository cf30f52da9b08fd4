"""The broker: what travels, where it rests, the doors for producers, and what workers share."""
