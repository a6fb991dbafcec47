"""The methods: what can be removed from a layer, the scores that decide what, and what makes up for it.

Importing this registers the built-in ones, without torch: a new folder or file with a method is listed here and nowhere
else.
"""

import ssmc.compressor.methods.channels.method
import ssmc.compressor.methods.experts.method
import ssmc.compressor.methods.layers.method
import ssmc.compressor.methods.quantize.method
import ssmc.compressor.methods.refine.method
import ssmc.compressor.methods.states.method
import ssmc.compressor.methods.units.method
import ssmc.compressor.methods.weights.method
import ssmc.compressor.methods.width.method  # noqa: F401
