-- The tokens of the windows of one corpus file that may be selected: more than the budget needs.
-- in:  scores(row, window, domain, key, ...), bounds(domain, key_min), texts(row, window, text)
-- out: domain, key, tokens
SELECT s.domain, s.key, array_length(tokenize(texts.text)) AS tokens
FROM scores AS s JOIN bounds ON bounds.domain = s.domain AND s.key >= bounds.key_min
JOIN texts ON texts.row = s.row AND texts.window = s.window
