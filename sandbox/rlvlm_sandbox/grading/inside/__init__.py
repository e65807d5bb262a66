"""What runs inside the sandboxes of a grading or a session. Sent there by programs.py; imports nothing but each other.

Whatever shares a process with the candidate can be bent by it. So the candidate's side is never asked whether it
passed: all that it can send are values, and these are answers.
"""
