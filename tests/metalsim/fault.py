"""What checked mode reports."""


class Fault(Exception):  # noqa: N818
    """An error in a kernel: its kind, its place in the kernel's text, and one line that says it."""

    def __init__(self, kind, place, text):
        self.kind = kind
        self.place = place
        self.text = text
        super().__init__(f"{kind}: {place}: {text}" if place else f"{kind}: {text}")
