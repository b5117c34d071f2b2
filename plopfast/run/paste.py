"""--print-peft: a run's placement as the settings of other tools."""

from ..integrations.snippets import Adapter, snippets
from ..lora.placement import Placement
from ..models.loading import shapes_source
from ..models.shapes import model_of
from ..placing.by_settings import placed as choose
from ..scoring.report import NFNReport
from ..support.errors import PlopfastError, first_line
from .run import Run


def peft_text(run: Run, placed: bool = True) -> str:
    """Returns what --print-peft shows: how other tools put adapters where this run has them.

    Where nothing is `placed` yet, it shows what `plopfast place` would choose by the settings. Names come from the model's
    shapes, so no weights are loaded for them.
    """
    config, notes = run.config, []
    if not placed:
        placement = choose(NFNReport.load(run.file("score")), config.placing)
        notes.append("what plopfast place would choose by these settings; nothing is placed yet")
    else:
        placement = Placement.load(run.file("place"))
    adapter = Adapter(dropout=config.dropout, rslora=config.rslora, dora=config.dora, init=config.init)
    try:
        return snippets(placement, model_of(shapes_source(config.model)), adapter, notes)
    except PlopfastError as error:
        notes.append(f"full names, as the model's own names cannot be had: {first_line(error)}")
        return snippets(placement, None, adapter, notes)
