"""The distributed file system: directories and headers in db, content in chunks on the ring, REST."""

from gostore.services.fs.rest import RestServer
from gostore.services.fs.service import FsService

__all__ = ["FsService", "RestServer"]
