"""Checks of a dataset. Each is a function check(data) -> list[Finding], by itself; policy.data.validate runs them all."""
