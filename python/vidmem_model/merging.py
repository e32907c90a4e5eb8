def compress_merge(*a): raise NotImplementedError
def read_merge(*a): raise NotImplementedError
