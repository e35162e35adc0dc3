"""kdbench: which way of distilling this teacher into this student is best, and by how much?"""

__version__ = "0.1.0"
