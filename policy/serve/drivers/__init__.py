"""Robots behind one small interface (policy.serve.robot.Driver): one file and one extra each."""
