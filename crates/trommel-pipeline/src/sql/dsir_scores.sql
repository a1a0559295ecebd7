-- log_weights(text): the log importance weight of each window of one corpus file, for every domain at once.  [DS]
-- The key adds noise that is a hash of the seed, the domain and the window, from the Gumbel distribution: the windows of highest
-- key are a sample without replacement, in proportion to the weights. A window of few words has none and is not selected.
-- in:  texts(document, window, row, byte_len, text, ...)
-- out: document, window, row, byte_len, domain, words, log_weight, key
SELECT document, window, row, byte_len, w['domain'] AS domain, w['words'] AS words, w['log_weight'] AS log_weight,
       CASE WHEN w['words'] >= {words_min} THEN w['log_weight'] + gumbel(w['domain'], document, window) END AS key
FROM (SELECT document, window, row, byte_len, unnest(log_weights(text)) AS w FROM texts)
