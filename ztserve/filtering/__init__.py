"""What may leave?"""

from ztserve.filtering.outputs import OutputFilter
from ztserve.filtering.release import ReleaseStream
from ztserve.filtering.text import Filtered, TextFilter, TextStream

__all__ = ["Filtered", "OutputFilter", "ReleaseStream", "TextFilter", "TextStream"]
