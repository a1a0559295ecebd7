-- The vectors that the clustering is fitted on: the windows of lowest priority, a number that is a hash of the seed and
-- the window's key, so the same windows are chosen however the corpus is split into files.
-- in:  embeddings(document, window, embedding, ...)
-- out: priority, embedding
SELECT priority, embedding
FROM (SELECT priority(document, window) AS priority, embedding FROM embeddings)
WHERE priority <= {highest}
