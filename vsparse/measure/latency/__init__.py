"""Where the time of a generation goes: measured parts, what they add up to, what a cost model predicts, and reports."""
