"""Records of preference data, and a parser for every common form of them.

| form | fields | responses |
| --- | --- | --- |
| `pair` | prompt, chosen, rejected; or chosen, rejected as whole message lists | 2 |
| `hh` | chosen, rejected: dialogues as text, "\\n\\nHuman: ...\\n\\nAssistant: ..." | 2 |
| `judged` | prompt, two answers, and which of them is better | 2 |
| `comparison` | info, summaries, choice (Stiennon et al. 2020) | 2 |
| `instruction` | instruction, input (may be absent), chosen, rejected; or output | 1 or more |
| `ranked` | prompt, responses (best first, or with ranks or scores) | K |
| `unpaired` | prompt, completion, label (true: desirable) | 1 |
| `text` | text; or prompt, completion; or messages | 1 |
| `classified` | text, label (the name or number of its class); has to be named, not `auto` | 1 |

A prompt or response that is text in the table may also be a list of messages
`{"role": ..., "content": ...}`. Nothing here tokenises, strips or repairs a text. `docs/data.md`
has all names of fields, and an example of each form.

| file | what it holds |
| --- | --- |
| `record` | what a row becomes |
| `fields` | checked access to a row |
| `dialogues` | messages, roles, and what two dialogues have in common |
| `pairs` `instructions` `rankings` `singles` | the forms |
| `context` | system, history, tools, template options, weight: in rows of any form |
| `forms` | the table of forms; `parse` |
| `columns` | the mapping `data.columns` |
"""

from dpojax.data.records.columns import Columns, read_columns, without_invented_nulls
from dpojax.data.records.forms import FORMS, Form, detect, parse
from dpojax.data.records.record import (
    Content,
    DataError,
    Messages,
    Record,
    RecordError,
    Scores,
    message_text,
)

__all__ = [
    "FORMS",
    "Columns",
    "Content",
    "DataError",
    "Form",
    "Messages",
    "Record",
    "RecordError",
    "Scores",
    "detect",
    "message_text",
    "parse",
    "read_columns",
    "without_invented_nulls",
]
