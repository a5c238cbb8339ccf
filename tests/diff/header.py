"""What the comparison reads of the header of a qcow2 image."""

import struct


class Header:
    """The fields, those that version 2 lacks as it implies them."""

    def __init__(self, file):
        file.seek(0)
        data = file.read(104)
        self.version, = struct.unpack_from('>I', data, 4)
        self.cluster = 1 << struct.unpack_from('>I', data, 20)[0]
        self.size, = struct.unpack_from('>Q', data, 24)
        self.l1_size, self.l1_table = struct.unpack_from('>IQ', data, 36)
        self.refcount_table, = struct.unpack_from('>Q', data, 48)
        incompatible = compatible = autoclear = 0
        self.refcount_order, self.length = 4, 72
        if self.version >= 3:
            incompatible, compatible, autoclear = struct.unpack_from('>QQQ', data, 72)
            self.refcount_order, self.length = struct.unpack_from('>II', data, 96)
        self.dirty = bool(incompatible & 1)
        self.extended_l2 = bool(incompatible & 16)
        self.lazy_refcounts = bool(compatible & 1)
        self.bitmaps = bool(autoclear & 1)

    @classmethod
    def of(cls, path):
        """That of the image in a file."""
        with open(path, 'rb') as file:
            return cls(file)
