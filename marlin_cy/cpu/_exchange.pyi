from typing import final

@final
class Hosts:
    def __init__(self, group: object) -> None: ...
