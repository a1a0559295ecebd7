-- windows(text), embed(text) and priority(document, window): the windows of one input file, with their vectors and their place
-- in a sample.
-- in:  source(file, row, id, text, source)
-- out: document, window, file, row, byte_start, byte_len, source, text, embedding, priority
SELECT document, w['window'] AS window, file, row, w['byte_start'] AS byte_start, w['byte_len'] AS byte_len,
       source, w['text'] AS text, embed(w['text']) AS embedding, priority(document, w['window']) AS priority
FROM (SELECT coalesce(id, content_key(text)) AS document, file, row, source, unnest(windows(text)) AS w FROM source)
