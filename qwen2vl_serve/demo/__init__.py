"""The demo model: a small Qwen2-VL, drawn for, asked, trained and scored by this package.

Importing it does nothing; torch is imported only by the modules that train.
"""
