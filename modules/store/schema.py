"""The schema of the database, as the steps that lead to it."""

from __future__ import annotations

MIGRATIONS: tuple[str, ...] = (
    # Each is SQL that leads from version n to n + 1; never edit one that was released.
    # owners: one name may stand in several rows. change_owner() renames rows, so the index, which holds the row's id, stays as it is.
    # turn: the order of changes. The clock may jump, this does not.
    # messages.parent has no foreign key: cascading down a branch would recurse once a message; add() checks it.
    """
    CREATE TABLE owners (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL);
    CREATE INDEX owners_name ON owners (name);
    CREATE TABLE conversations (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner INTEGER NOT NULL REFERENCES owners (id),
        title TEXT NOT NULL, tip TEXT, changed REAL NOT NULL, turn INTEGER NOT NULL
    );
    CREATE INDEX conversations_owner ON conversations (owner, turn);
    CREATE INDEX conversations_turn ON conversations (turn);
    CREATE TABLE messages (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
        conversation INTEGER NOT NULL REFERENCES conversations (number), parent TEXT, role TEXT NOT NULL, created REAL NOT NULL,
        state TEXT NOT NULL, details TEXT NOT NULL, reasoning TEXT NOT NULL, text TEXT NOT NULL
    );
    CREATE INDEX messages_parent ON messages (conversation, parent);
    CREATE INDEX messages_running ON messages (conversation) WHERE state = 'running';
    CREATE VIEW message_search AS
        SELECT m.number, 'o' || c.owner AS owner, search_text(m.text) AS text FROM messages m JOIN conversations c ON c.number = m.conversation;
    CREATE VIEW title_search AS SELECT number, 'o' || owner AS owner, search_text(title) AS text FROM conversations;
    CREATE VIRTUAL TABLE message_index USING fts5 (
        owner, text, content = 'message_search', content_rowid = 'number', columnsize = 0, prefix = '1 2', tokenize = 'unicode61 remove_diacritics 2'
    );
    CREATE VIRTUAL TABLE title_index USING fts5 (
        owner, text, content = 'title_search', content_rowid = 'number', columnsize = 0, prefix = '1 2', tokenize = 'unicode61 remove_diacritics 2'
    );
    CREATE TABLE sessions (key TEXT PRIMARY KEY, "values" TEXT NOT NULL, saved REAL NOT NULL);
    CREATE INDEX sessions_saved ON sessions (saved);
    """,
    # The list's order is pinned, turn, changed, number: an imported conversation takes the turn of its neighbour in time (see `place_in_time`).
    # trash.content holds rows as they were, numbers included: what comes back stands exactly where it stood (numbers are never given twice).
    """
    ALTER TABLE conversations ADD COLUMN created REAL NOT NULL DEFAULT 0;
    ALTER TABLE conversations ADD COLUMN folder TEXT NOT NULL DEFAULT '';
    ALTER TABLE conversations ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE conversations ADD COLUMN settings TEXT NOT NULL DEFAULT '{}';
    ALTER TABLE conversations ADD COLUMN summary TEXT NOT NULL DEFAULT '';
    UPDATE conversations SET created = coalesce(
        (SELECT min(m.created) FROM messages m WHERE m.conversation = conversations.number AND m.parent IS NULL AND m.created > 0), changed);
    DROP INDEX conversations_owner;
    CREATE INDEX conversations_listed ON conversations (owner, pinned, turn, changed);
    CREATE INDEX conversations_folder ON conversations (owner, folder, pinned, turn, changed);
    CREATE INDEX conversations_changed ON conversations (owner, changed);
    CREATE TABLE tags (
        conversation INTEGER NOT NULL REFERENCES conversations (number) ON DELETE CASCADE, name TEXT NOT NULL, PRIMARY KEY (conversation, name)
    ) WITHOUT ROWID;
    CREATE INDEX tags_name ON tags (name);
    CREATE TABLE explanations (
        message INTEGER PRIMARY KEY REFERENCES messages (number) ON DELETE CASCADE, prompt TEXT NOT NULL, tokens BLOB NOT NULL
    );
    CREATE TABLE trash (
        number INTEGER PRIMARY KEY AUTOINCREMENT, owner INTEGER NOT NULL REFERENCES owners (id), kind TEXT NOT NULL, title TEXT NOT NULL,
        conversation TEXT NOT NULL, removed REAL NOT NULL, content TEXT NOT NULL
    );
    CREATE INDEX trash_owner ON trash (owner);
    CREATE INDEX trash_removed ON trash (removed);
    CREATE TABLE drafts (owner INTEGER NOT NULL REFERENCES owners (id), conversation TEXT NOT NULL, saved REAL NOT NULL, text TEXT NOT NULL);
    CREATE UNIQUE INDEX drafts_conversation ON drafts (conversation, owner);
    CREATE INDEX drafts_saved ON drafts (owner, saved);
    CREATE TABLE imports (key TEXT PRIMARY KEY) WITHOUT ROWID;
    """,
    # responses: those of the API's /v1/responses. previous: the response that this one goes on from; used: the order in which they were made or
    # gone on from. The index holds all that is needed to choose those that must go.
    """
    CREATE TABLE responses (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, client TEXT NOT NULL, previous TEXT, used INTEGER NOT NULL,
        size INTEGER NOT NULL, items TEXT NOT NULL, body TEXT NOT NULL
    );
    CREATE INDEX responses_used ON responses (used, number, size);
    """,
)
