"""Whether the scores can be trusted: the audit."""

from ..support.tables import Table
from .figures import Section, Tables
from .folder import RunFolder
from .tables import audit_tables
from .words import listed


def audit(run: RunFolder) -> Section:
    """audit.json: whether the scores can be trusted."""
    section = Section(
        id="audit", title="Can the scores be trusted?", nav="Audit of the scores", command=run.noted("audit")
    )
    found = run.audit
    if not found:
        section.lacks = ("The scores were not audited.", run.command("audit"))
        return section
    section.answer = [found["verdict"]]
    section.caveats = [
        f"NFN of {found['prompts']} prompts picks {listed(found['pick'])}. Everything is compared with that.",
        *(f"Skipped: {row['kind']}, {row['what']}: {row['why']}." for row in found.get("missing", [])),
    ]
    section.body = [
        Tables(title=table.caption, table=Table("", table.columns, table.rows), note=table.note)
        for table in audit_tables(found)
    ]
    return section
