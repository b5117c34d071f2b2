class _N:
    def write(self, r): ...
    def close(self): ...


def open_log(*a):
    return _N()
